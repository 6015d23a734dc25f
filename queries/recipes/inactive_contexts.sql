-- Contexts that do not activate a feature
--
-- A uniform sample of the contexts with counted tokens, none of which activates it, by a hash of their place
-- in the corpus: the same seed gives the same contexts whatever the history of scans.
--
-- needs: activations of sae; contexts
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param seed INTEGER = 0: another one draws others
-- param width COUNT = 20: half of the tokens of text shown
-- param limit LIMIT = 20: rows
SELECT
    $sae AS sae, $feature AS feature, snippet(c.context, $width, $width) AS text,
    d.id, d.corpus, d.source, d.row, c.start, c.context
FROM contexts AS c
JOIN documents AS d ON d.document = c.document
WHERE list_contains(c.counted, true)
    AND c.context NOT IN (SELECT context FROM activations WHERE sae = $sae AND feature = $feature)
ORDER BY md5(concat_ws('/', $seed, d.corpus, d.source, d.row, c.start)), c.context
LIMIT $limit
