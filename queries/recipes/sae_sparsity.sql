-- Sparsity and L0 of every SAE, by layer
--
-- `measured_l0` is active features per counted token of the SAE, `nominal_l0` what was published; `dead`
-- features never fired, `dense` ones have a density of at least $density; `median_density` is over those
-- that fired.
--
-- needs: saes; features
-- param density DOUBLE = 0.1: what counts as dense
-- param sae SAE = all: one SAE
SELECT
    s.sae, s.layer, s.site, s.width, s.nominal_l0, s.measured_l0, s.measured_l0 / s.width AS mean_density,
    count(*) FILTER (f.n_tokens = 0) AS dead, count(*) FILTER (f.n_tokens = 0) / s.width AS dead_share,
    count(*) FILTER (f.density >= $density) AS dense,
    median(f.density) FILTER (f.n_tokens > 0) AS median_density, s.fvu, s.n_tokens
FROM saes AS s
JOIN features AS f ON f.sae = s.sae
WHERE $sae IS NULL OR s.sae = $sae
GROUP BY s.sae, s.layer, s.site, s.width, s.nominal_l0, s.measured_l0, s.fvu, s.n_tokens
ORDER BY s.layer, s.site, s.width, s.sae
