-- Ultra-dense features, the densest first
--
-- Features with `density`, active tokens per counted token of the SAE, of at least $density.
--
-- needs: features
-- param density DOUBLE = 0.1: lowest density shown
-- param sae SAE = all: one SAE
-- param limit LIMIT = 20: rows
SELECT sae, feature, density, n_tokens, n_contexts, n_documents, mean_active, std_active, max
FROM features
WHERE density >= $density AND ($sae IS NULL OR sae = $sae)
ORDER BY density DESC, sae, feature
LIMIT $limit
