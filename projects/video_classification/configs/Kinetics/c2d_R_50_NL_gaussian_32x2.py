# Table 2a, Gaussian: 72.5 top-1, 90.2 top-5 (paper, not reproduced here)
from ..common.models import NL, classifier

model = classifier(**NL, block_options={"pairwise": "gaussian"})
