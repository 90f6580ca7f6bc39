"""From what a user brings (the Hub, local files, procedural tasks) to records, resumable streams and tokens."""
