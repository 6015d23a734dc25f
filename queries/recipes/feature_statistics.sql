-- Statistics of one feature
--
-- How often and how strongly it fires: `density` is its active tokens per counted token of the SAE, the rest
-- is over its active tokens; quantiles come from the histogram, within 4.5 %.
--
-- needs: features
-- param sae SAE: the SAE
-- param feature FEATURE: the feature
SELECT
    sae, feature, n_tokens, n_contexts, n_documents, density, mean_active, std_active, max, p50, p90, p99,
    histogram
FROM features
WHERE sae = $sae AND feature = $feature
