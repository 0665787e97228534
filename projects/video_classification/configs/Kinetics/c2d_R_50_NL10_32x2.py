# Table 2c, R50, 10 blocks: 74.3 top-1, 91.2 top-5 (paper, not reproduced here)
from ..common.models import NL10, classifier

model = classifier(**NL10)
