"""A reward that is handed secrets, as one that asks a service is."""

from reward_models import rules


def by_length(prompts, completions, completion_ids=None, *, api_key, url, **columns):
    """By length; the secrets must be there."""
    assert "horse" in api_key and "horse" in url
    return rules.length(prompts, completions, completion_ids, scale=16, tokens=4)
