#!/usr/bin/env bash
# The main job on real input: corpus and model are put under out/demo, scanned through local Ray, and
# asked what fired. Running it again resumes, or finds nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/demo

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

python examples/corpus.py $out
python examples/model.py $out/model.gguf
say corpuscope saes examples/saes/smollm2-135m-res
say corpuscope scan examples/demo.yaml
say corpuscope status $out/index
say corpuscope sql $out/index "
  SELECT s.sae, round(measured_l0, 1) AS l0, round(fvu, 3) AS fvu,
    count(*) FILTER (f.n_tokens = 0) AS dead, round(median(f.density), 5) AS median_density
  FROM saes s JOIN features f USING (sae) GROUP BY ALL ORDER BY s.sae"
