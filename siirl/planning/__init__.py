"""The planner as an instrument: what a pipeline needs on a cluster before anybody rents it.

From a configuration, a model's shape and a cluster's facts: memory per worker, bytes through each redistribution, time
per stage, the best layout, and a simulated step over thousands of workers. `docs/cost-model.md` writes down every
formula. Importing this package imports no torch.
"""
