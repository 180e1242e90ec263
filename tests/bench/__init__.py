"""Programs that measure: ``python -m tests.bench.NAME``. README.md says what each is for."""
