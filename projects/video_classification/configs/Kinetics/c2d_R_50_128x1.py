# Table 2g, C2D R50: 73.8 top-1, 91.2 top-5 (paper, not reproduced here)
from ..common.models import long_classifier

model = long_classifier()
