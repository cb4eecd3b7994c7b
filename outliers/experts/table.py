"""The routing table: for each token and layer the experts it was routed to, and the largest values of each.

Its fields and shapes are in `study.expert_shapes`, for planning and the store need them too.
"""

from outliers.study.expert_shapes import FIELDS as FIELDS
from outliers.study.expert_shapes import MARGIN as MARGIN
from outliers.study.expert_shapes import NOBODY as NOBODY
from outliers.study.expert_shapes import ROUTING as ROUTING
from outliers.study.expert_shapes import ExpertShapes as ExpertShapes
from outliers.study.expert_shapes import number_of as number_of
