"""What was judged: preference files read into items, pairs, groups and splits."""

from probekit.preferences.loading import load_preferences
from probekit.preferences.preference_set import PreferenceSet

__all__ = ["PreferenceSet", "load_preferences"]
