"""One gradient, whatever the strategy: two processes against one, case by case.

`pytest -s tests/training/test_scale.py` prints the table of docs/scale.md.
"""

import pytest
import torch

import tiny
from ranks import Ranks
from training_scale_cases import CASES, REFUSED, steps

TIMEOUT_S = 900
LARGEST = 5e-6
"""Of the largest gradient: rounding of fp32 sums in another order; found were up to 2e-6."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """Gradient and loss of every case, and of its reference."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("scale")
    tiny.shards(folder / "shards", 40)
    alone = [case for case in CASES if case.num_ranks == 1]
    alone = list(dict.fromkeys([*alone, *(case.reference for case in CASES)]))
    shared = [*(case for case in CASES if case.num_ranks == 2), REFUSED]
    running = [
        Ranks(ranks, folder / f"{ranks}", steps, cases, ranks, folder / "shards", folder)
        for ranks, cases in ((1, alone), (2, shared))
    ]
    for ranks in running:
        for status, said in ranks.end(TIMEOUT_S):
            assert status == 0, said
    found = {}
    for ranks in (1, 2):
        parts = [torch.load(folder / f"{ranks}.{rank}.pt") for rank in range(ranks)]
        for name, (gradient, _) in parts[0].items():
            told = [part[name][1] for part in parts]
            loss = told[0] if name == str(REFUSED) else sum(told) / ranks
            found[name] = {"gradient": gradient, "loss": loss}
    return found


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_that_of_one_process_on_the_whole_batch(results, case):
    found, reference = results[str(case)], results[str(case.reference)]
    assert found["gradient"].keys() == reference["gradient"].keys()
    largest = max(float(g.abs().max()) for g in reference["gradient"].values())
    differences = {
        name: float((gradient - reference["gradient"][name]).abs().max()) / largest
        for name, gradient in found["gradient"].items()
    }
    worst = max(differences, key=differences.__getitem__)
    print(f"| {case} | {case.num_ranks} | {differences[worst]:.1e} |")
    assert differences[worst] < LARGEST, worst
    assert found["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert all(gradient.any() for gradient in reference["gradient"].values())


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_what_zero_2_cannot_do_is_refused(results):
    assert "gradient_cache with accumulate_grad_batches" in results[str(REFUSED)]["loss"]
