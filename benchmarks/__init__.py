"""One script a published table, run from the repository: ``python -m benchmarks.rows``. Not installed."""
