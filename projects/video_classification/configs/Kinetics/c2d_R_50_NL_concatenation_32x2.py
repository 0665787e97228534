# Table 2a, concatenation: 72.8 top-1, 90.5 top-5 (paper, not reproduced here)
from ..common.models import NL, classifier

model = classifier(**NL, block_options={"pairwise": "concatenation"})
