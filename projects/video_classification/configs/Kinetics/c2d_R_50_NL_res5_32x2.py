# Table 2b, res5: 72.3 top-1, 90.1 top-5 (paper, not reproduced here)
from ..common.models import classifier

model = classifier(after_blocks={"res5": [-2]})
