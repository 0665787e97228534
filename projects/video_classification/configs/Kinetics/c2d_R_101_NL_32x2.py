# Table 2c, R101, 1 block: 74.3 top-1, 91.3 top-5 (paper, not reproduced here)
from ..common.models import NL, R101, classifier

model = classifier(**R101, **NL)
