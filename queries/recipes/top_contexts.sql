-- Max-activating contexts of a feature, with text
--
-- One context a document, near-duplicates left out, highest absolute activation first; exact over the whole
-- corpus, `top_k` of the spec at most. `positions` and `values` are the active tokens within 64 of the
-- maximum.
--
-- needs: top_contexts
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param width COUNT = 20: tokens of text on either side of the maximum
-- param limit LIMIT = 20: rows
SELECT
    t.sae, t.feature, t.rank, t.activation, snippet(t.context, t.position, $width) AS text,
    d.id, d.corpus, d.source, d.row, t.context, t.position, t.positions, t.values
FROM top_contexts AS t
JOIN contexts AS c ON c.context = t.context
JOIN documents AS d ON d.document = c.document
WHERE t.sae = $sae AND t.feature = $feature
ORDER BY t.rank
LIMIT $limit
