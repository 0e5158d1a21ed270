"""From audio files to batches: sources, shards, the epoch plan, the pipeline."""
