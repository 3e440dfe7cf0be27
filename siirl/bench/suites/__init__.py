"""The suites: modules that pytest collects, each a few functions ``bench_…`` that hand work to ``measure``."""
