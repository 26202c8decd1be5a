"""What was judged: preference files read into items, pairs, groups and splits."""

from probekit.preferences.preference_set import PreferenceSet, load_preferences

__all__ = ["PreferenceSet", "load_preferences"]
