"""Whether a calibration tells the truth: each of its plans is searched again."""

import pytest


def assert_plans_do_what_was_measured(store, queries, found):
    """Recall of ten among the exact search's, and bytes that one query reads."""
    exact = store.search(queries, str(store.groups[-1])).rows
    for row in found.measured:
        plan = {"cascade": row.plan} if ":" in row.plan else {"budget": row.plan}
        hits = store.search(queries, **plan)
        kept = [len(set(a) & set(b)) / 10 for a, b in zip(hits.rows, exact, strict=True)]
        assert row.recall == pytest.approx(sum(kept) / len(kept), abs=0.004)
        assert row.bytes_read == store.search(queries[:1], **plan).bytes_read
