# Table 2d, R50, space only: 72.9 top-1, 90.8 top-5 (paper, not reproduced here)
from ..common.models import NL5, classifier

model = classifier(**NL5, block_options={"axes": "space"})
