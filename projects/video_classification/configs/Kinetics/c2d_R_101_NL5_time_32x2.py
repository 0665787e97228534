# Table 2d, R101, time only (no space to pool): 74.4 top-1, 90.5 top-5 (paper, not reproduced here)
from ..common.models import R101_NL5, classifier

model = classifier(**R101_NL5, block_options={"axes": "time", "subsample": 1})
