"""The conformance run: what the framework promises of a device, checked on that device, level by level.

Importing this package imports no torch; :func:`siirl.validation.run.run` does.
"""
