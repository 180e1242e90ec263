import pytest

pytest.register_assert_rewrite(
    "tests.contract.contract_requests",
    "tests.contract.engine_contract",
    "tests.contract.generation_contract",
    "tests.contract.refactoring_contract",
)
