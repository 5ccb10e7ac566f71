#!/usr/bin/env bash
# Ten seeds of the dense network on all training images, on a GPU: the range of
# their mean, the range of a further seed, and p of the authors' single run.
source "$(dirname "$0")/../../common.sh"

export JAX_DEFAULT_MATMUL_PRECISION=float32
sweep food101_6_resnet18_64px ten_seeds --grid=method=dense \
  --grid=seed=0,1,2,3,4,5,6,7,8,9 --train_split=train --validation_split=none \
  --cache_size=128 --parallel=7 --workdir=workdir/food_ten_seeds
python - $results/ten_seeds/results.csv <<'END'
import csv
import sys

import numpy as np
from scipy import stats

rows = csv.DictReader(open(sys.argv[1]))
a = np.array([float(row['accuracy']) for row in rows])
mean, std, t = a.mean(), a.std(ddof=1), stats.t(len(a) - 1)
new = std * (1 + 1 / len(a)) ** 0.5
half = t.ppf(0.975)
print(f'mean {mean:.3f}, standard deviation {std:.3f}')
for name, width in ('mean', std / len(a) ** 0.5), ('further seed', new):
  low, high = mean - half * width, mean + half * width
  print(f'95 % interval of the {name}: {low:.3f} to {high:.3f}')
print(f'p of 0.699: {2 * t.sf((0.699 - mean) / new):.2f}')
END
