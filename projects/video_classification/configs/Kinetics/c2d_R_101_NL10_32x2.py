# Table 2c, R101, 10 blocks: 75.1 top-1, 91.6 top-5 (paper, not reproduced here)
from ..common.models import R101_NL10, classifier

model = classifier(**R101_NL10)
