# Table 2d, R50, time only (no space to pool): 73.1 top-1, 90.5 top-5 (paper, not reproduced here)
from ..common.models import NL5, classifier

model = classifier(**NL5, block_options={"axes": "time", "subsample": 1})
