# Table 2a, dot product: 72.9 top-1, 90.3 top-5 (paper, not reproduced here)
from ..common.models import NL, classifier

model = classifier(**NL, block_options={"pairwise": "dot_product"})
