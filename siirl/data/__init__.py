"""The Data Coordinator: batches, the distributed dataloader, the distributed databuffer and balancing.

Importing this package imports no torch; `siirl.data.batch`, `databuffer` and their users do.
"""
