-- L0 of an SAE by position in the context
--
-- `n_tokens` is how many contexts have a counted token at the position (0 is the first as run, BOS too),
-- `active` the activations there, `l0` active by n_tokens.
--
-- needs: activations of sae; contexts; every counted token of sae
-- param sae SAE: the SAE
-- param limit LIMIT = all: rows
WITH read AS (
    SELECT position, count(*) AS n_tokens
    FROM (SELECT unnest(counted) AS counted, unnest(range(len(counted))) AS position FROM contexts)
    WHERE counted
    GROUP BY position
), fired AS (
    SELECT position, count(*) AS active FROM activations
    WHERE sae = $sae
    GROUP BY position
)
SELECT
    $sae AS sae, r.position, r.n_tokens, coalesce(f.active, 0) AS active,
    coalesce(f.active, 0) / r.n_tokens AS l0
FROM read AS r
LEFT JOIN fired AS f ON f.position = r.position
ORDER BY r.position
LIMIT $limit
