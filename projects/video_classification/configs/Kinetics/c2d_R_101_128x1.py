# Table 2g, C2D R101: 75.3 top-1, 91.8 top-5 (paper, not reproduced here)
from ..common.models import R101, long_classifier

model = long_classifier(**R101)
