"""From data sets to batches. Each module's first line says what it is; in the order of the data:

a set opened      sources, by rows and parquet; known sets of the hub by adapters, adapt, whisper;
                  slices, normalize, selection; sounds and decode read what is heard
made into shards  prepare_command, prepare, shard_work by workers, shard_folder, shards; from the
                  hub with bounded disk by hub_sets, hub_files
texts or sound    pseudo_label, label_pieces, label_log; synthesize, speech_texts, espeak
    that are made
looked at         audit, audit_card, fingerprint; quality keeps what is bad
held out          splits, panel
an epoch          table, targets, draws, plan
batches           pipeline; clips has what all of them hand to each other
"""
