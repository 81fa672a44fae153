"""Where the time of a bundle goes: an engine's profile joined to the sites, work and ceilings, and what limits it."""

from vitfold.profile.advice import advise
from vitfold.profile.ceiling import Ceiling, ceiling_of, probes
from vitfold.profile.joining import BlockTime, KindTime, Profile, join
from vitfold.profile.kinds import KINDS

__all__ = ["KINDS", "BlockTime", "Ceiling", "KindTime", "Profile", "advise", "ceiling_of", "join", "probes"]
