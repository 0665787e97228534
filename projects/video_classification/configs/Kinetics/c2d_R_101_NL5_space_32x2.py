# Table 2d, R101, space only: 74.4 top-1, 91.3 top-5 (paper, not reproduced here)
from ..common.models import R101_NL5, classifier

model = classifier(**R101_NL5, block_options={"axes": "space"})
