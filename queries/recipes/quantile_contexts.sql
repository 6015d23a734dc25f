-- Contexts of a feature by strength: a uniform sample of each octave of activation
--
-- A stratum has the contexts whose maximum is from 2^stratum to below 2^(stratum + 1) in absolute value;
-- `stratum_contexts` is how many there are. `contexts_from` and `contexts_to` are the quantiles that it
-- covers among the contexts in which the feature fires, `tokens_from` and `tokens_to` those of its octave
-- among the active tokens (NULL below 2^-10, where the histogram ends).
--
-- needs: sampled_contexts; features
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
-- param width COUNT = 20: tokens of text on either side of the maximum
-- param limit LIMIT = 3: contexts of a stratum, drawn by hash from those that are kept
WITH samples AS (
    SELECT
        s.*, d.id, d.corpus, d.source, d.row,
        md5(concat_ws('/', d.corpus, d.source, d.row, c.start)) AS draw
    FROM sampled_contexts AS s
    JOIN contexts AS c ON c.context = s.context
    JOIN documents AS d ON d.document = c.document
    WHERE s.sae = $sae AND s.feature = $feature
), strata AS (
    SELECT stratum, any_value(stratum_contexts) AS n FROM samples GROUP BY stratum
), ranges AS (
    SELECT
        stratum,
        (sum(n) OVER (ORDER BY stratum) - n) / sum(n) OVER () AS contexts_from,
        sum(n) OVER (ORDER BY stratum) / sum(n) OVER () AS contexts_to
    FROM strata
), drawn AS (
    SELECT * FROM samples
    QUALIFY $limit IS NULL OR row_number() OVER (PARTITION BY stratum ORDER BY draw, context) <= $limit
)
-- Octaves are 8 bins of the histogram, whose first bin is what is below 2^-10.
SELECT
    d.sae, d.feature, d.stratum, d.activation, snippet(d.context, d.position, $width) AS text,
    d.stratum_contexts, r.contexts_from, r.contexts_to,
    CASE WHEN d.stratum >= -10
        THEN list_sum(f.histogram[1 : least(8 * d.stratum + 81, 193)]) / f.n_tokens END AS tokens_from,
    CASE WHEN d.stratum >= 14 THEN 1.0 WHEN d.stratum >= -11
        THEN list_sum(f.histogram[1 : 8 * d.stratum + 89]) / f.n_tokens END AS tokens_to,
    d.id, d.corpus, d.source, d.row, d.context, d.position
FROM drawn AS d
JOIN ranges AS r ON r.stratum = d.stratum
JOIN features AS f ON f.sae = $sae AND f.feature = $feature
ORDER BY d.stratum DESC, d.draw, d.context
