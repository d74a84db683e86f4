"""What a suite requires of a run, held against what the pass saw."""

import pytest

from pytest_qsa.captures import ExecutedModules, Execution
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.suite import Model, check_execution


def ran(*kinds, idle=(), forward=True):
    return Execution(forward, {words: ExecutedModules(4, f"layers.{words}") for words in kinds}, tuple(idle))


def model(*required, allow_idle=None):
    require = {"executed_as": list(required)} if required else None
    return Model.model_validate({"path": "x", "require": require, "allow_idle": allow_idle})


EMULATED, WEIGHTS = "W8A8 emulated", "W4A16 weights only"
HOLDS = {
    "nothing is required": (ran(EMULATED), model()),
    "nothing is known, and nothing is required": (None, model()),
    "the same words": (ran(EMULATED), model("W8A8 emulated")),
    "fewer words": (ran(EMULATED), model("emulated")),
    "other capitals": (ran(EMULATED), model("w8a8 EMULATED")),
    "one of several": (ran(EMULATED), model("W8A8 kernels", "W8A8 emulated")),
    "several kinds, each allowed": (ran(EMULATED, WEIGHTS), model("emulated", "weights only")),
    "floating point": (ran(), model("float")),
    "an idle module that may be": (ran(EMULATED, idle=["lm_head"]), model(allow_idle="head$")),
}


@pytest.mark.parametrize("case", HOLDS)
def test_a_run_as_required_is_taken(case):
    check_execution(*HOLDS[case])


FAILS = {
    "another way": (ran(WEIGHTS), model("W8A8 emulated"), InfraError),
    "another way in one kind": (ran(EMULATED, WEIGHTS), model("W8A8 emulated"), InfraError),
    "other bits": (ran("W4A8 emulated"), model("W8A8 emulated"), InfraError),
    "floating point": (ran(), model("emulated"), InfraError),
    "no forward": (ran(forward=False), model("float"), InfraError),
    "nothing is known": (None, model("float"), InfraError),
    "a module that never ran": (ran(EMULATED, idle=["lm_head"]), model(), AnomalyError),
    "one that may be idle, and one that may not": (ran(idle=["a", "lm_head"]), model(allow_idle="^a"), AnomalyError),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_run_otherwise_is_told(case):
    execution, required, error = FAILS[case]
    with pytest.raises(error):
        check_execution(execution, required)


def test_the_message_names_what_was_required_what_ran_and_the_first_module():
    with pytest.raises(InfraError) as caught:
        check_execution(ran(WEIGHTS), model("W8A8 emulated", "W8A8 kernels"))
    assert str(caught.value) == (
        "model.require: executed_as: W8A8 emulated or W8A8 kernels is not what ran: "
        "4 modules, the first layers.W4A16 weights only, ran as W4A16 weights only: no input is rounded in its calls"
    )
    with pytest.raises(AnomalyError, match=r"the quantized module a \(and 1 more\) never ran"):
        check_execution(ran(idle=["a", "b"]), model())
