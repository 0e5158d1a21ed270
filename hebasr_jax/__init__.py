"""Qwen3-ASR in JAX: weights in and out of Hugging Face form, training and decoding for Hebrew.

Each module's first line says what it is. By what one comes looking for:

the model          model/, config, features, loss; parameters by paths, sharding
in and out         weights, layout, tensor_file, hub, export, upload; card, card_text
text and times     text, timestamps
data               data/ (its own map), augment, sound_level
a training run     train; run_config, config_file, config_sense, field_types; run_folder, run_setup,
                   run_start, run_changes, stages, running, finish; distributed, program_cache
one step           train_step, optim, rate_tables, flops, throughput, step_memory, dry_run
what is kept       checkpoint, trained, average, members, identity
what is told       tracking, sinks; report, report_final, page, charts
validation         validate
decoding           transcribe; generate, beam, slots, longform, silence, audio; writers, subtitles
evaluation         evaluate, eval_sets, benchmark_sets, hypotheses, control, overlap
scores             metrics, scoring, significance, comparison, output_style, ablate
    on a page      report_eval, report_set, alignment
commands           cli, __main__, flags, errors; audit_command, average_command, bench_command,
                   evaluate_command, panel_command, split_command, transcribe_command
measuring speed    bench/
trying it out      demo, demo_corpus, tiny
"""

__version__ = "0.1.0"
