"""`exclude: [{norm_above: k}]` leaves loud tokens out per site, and only there."""

from __future__ import annotations

import torch

import queries
from pipelines.chunks import norm_above


def test_tokens_far_above_their_contexts_median_norm_are_found_and_padding_is_not_looked_at():
    x = torch.zeros(2, 6, 3)
    x[0, :, 0] = torch.tensor([1.0, 1.1, 0.9, 10.5, 1.0, 9.0])
    x[1, :, 1] = torch.tensor([5.0, 5.0, 100.0, 0.0, 0.0, 0.0])
    context = torch.tensor([[0] * 6, [1] * 3 + [-1] * 3])
    # Medians: 1.05 of the first context; 5 of the second, over its three real tokens.
    assert norm_above(x, context, 10).tolist() == [
        [False] * 6,
        [False, False, True, False, False, False],
    ]
    assert norm_above(x, context, 9.9).tolist()[0] == [False, False, False, True, False, False]


def test_loud_tokens_have_no_rows_and_are_not_counted_at_their_site_alone(tmp_path, write_spec, scan_inline):
    exclude = ["special", "first", {"norm_above": 1.3}]
    scan_inline(write_spec(tmp_path / "plain"))
    scan_inline(write_spec(tmp_path / "quiet", context={"exclude": exclude}))
    a, b = (queries.connect(str(tmp_path / name / "index")) for name in ("plain", "quiet"))
    counted = "SELECT sum(len(list_filter(counted, lambda c: c))) FROM contexts"
    assert a.sql(counted).fetchall() == b.sql(counted).fetchall()
    tokens = "SELECT site, any_value(n_tokens) FROM saes GROUP BY site ORDER BY site"
    before, after = dict(a.sql(tokens).fetchall()), dict(b.sql(tokens).fetchall())
    assert len(set(after.values())) > 1, "sites must differ in what is loud"
    assert all(after[site] <= before[site] for site in before)
    assert after != before
    for sae, site in b.sql("SELECT sae, site FROM saes").fetchall():
        where = f"FROM activations WHERE sae = '{sae}'"
        active = b.sql(f"SELECT count(DISTINCT (context, position)) {where}").fetchall()[0][0]
        assert active <= after[site]
        density = b.sql(f"SELECT max(density * {after[site]} - n_tokens) FROM features WHERE sae = '{sae}'")
        assert abs(density.fetchall()[0][0]) < 1e-6
