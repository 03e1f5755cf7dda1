"""Mistakes in what guards a run and its user: identity of checkpoints, trust in others' files, limits of waits."""

from . import Mistake

IDENTITY = "tests/checkpoints/test_identity.py::"
TRUST = "tests/test_trust.py::"
LIMITS = "tests/data/sources/test_limits.py::"
STOPPING = "tests/test_stopping.py::"

SAFETY = [
    Mistake(
        "a second signal is not heard",
        "stopping.py",
        "if first is not None and wait is not None and",
        "if False and first is not None and wait is not None and",
        STOPPING + "test_a_second_signal_ends_a_run_whatever_it_waits_for",
    ),
    Mistake(
        "two copies of one signal count as two",
        "stopping.py",
        "and time.monotonic() - first > wait:",
        ":",
        STOPPING + "test_a_second_signal_ends_a_run_whatever_it_waits_for",
    ),
    Mistake(
        "a silent process is never noticed",
        "distributed.py",
        "if silent[other] >= limit:",
        "if False:",
        STOPPING + "test_a_silent_process_is_named",
    ),
    Mistake(
        "a loader process that hangs is waited for too long",
        "data/workers.py",
        "if waited >= limit:",
        "if waited >= 5 * limit:",
        "tests/data/test_workers.py::test_one_that_hangs_is_a_sentence_and_ends",
    ),
    Mistake(
        "loader processes outlive a killed trainer",
        "data/workers.py",
        "LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))",
        "pass",
        "tests/data/test_workers.py::test_loader_processes_end_with_a_trainer_that_is_killed_even_if_they_hang",
    ),
    Mistake(
        "a tensor that goes through a pipe loses its layout",
        "data/workers.py",
        "places = sorted(range(tensor.ndim), key=order.__getitem__)",
        "places = list(range(tensor.ndim))",
        "tests/data/test_workers.py::test_tensors_arrive_as_they_were",
    ),
    Mistake(
        "a directory that was moved away is not noticed",
        "checkpoints/lock.py",
        "        if not there:",
        "        if False:",
        IDENTITY + "test_a_checkpoint_is_not_written_to_another_directory",
    ),
    Mistake(
        "old checkpoints are deleted without a look at whose they are",
        "checkpoints/state.py",
        "            check()\n            _remove(folder_of(run_dir, old))",
        "            _remove(folder_of(run_dir, old))",
        IDENTITY + "test_no_checkpoint_of_another_run_is_deleted",
    ),
    Mistake(
        "a checkpoint of the same step is replaced without a look at whose it is",
        "checkpoints/state.py",
        "        check()\n        _remove(final)",
        "        _remove(final)",
        IDENTITY + "test_no_checkpoint_of_another_run_is_deleted",
    ),
    Mistake(
        "a checkpoint under the name of another step is taken",
        "checkpoints/state.py",
        'if folder.name.startswith("step_") and folder.name !=',
        "if False and folder.name !=",
        IDENTITY + "test_a_copy_under_another_name_is_no_checkpoint",
    ),
    Mistake(
        "a checkpoint of another run is taken",
        "checkpoints/state.py",
        'if owner and (record.get("run") or owner) != owner:',
        "if False:",
        IDENTITY + "test_a_checkpoint_of_another_run_is_passed_over_and_one_of_an_older_version_is_not",
    ),
    Mistake(
        "moments of another shape are loaded",
        "checkpoints/state.py",
        "for tensors, wanted in ((weights, state), (moments, expected)):",
        "for tensors, wanted in ((weights, state),):",
        IDENTITY + "test_tensors_that_are_not_of_this_model_are_found_before_any_is_loaded",
    ),
    Mistake(
        "files are written through links",
        "checkpoints/textfile.py",
        "os.replace(fresh, path)",
        "os.replace(fresh, os.path.realpath(path))",
        "tests/checkpoints/test_textfile.py::test_a_link_is_replaced_and_its_target_stays",
    ),
    Mistake(
        "folders of results may be links",
        "checkpoints/textfile.py",
        "        if folder.is_symlink():",
        "        if False:",
        "tests/checkpoints/test_textfile.py::"
        "test_folders_are_made_below_the_one_that_the_user_named_and_may_be_no_links",
    ),
    Mistake(
        "an export of a run with a damaged newest checkpoint says nothing",
        "export/__init__.py",
        'if subject.detail.get("notes"):',
        "if False:",
        "tests/export/test_timm_folder.py",
    ),
    Mistake(
        "kept features with changed bits are used",
        "evaluation/feature_cache.py",
        'found != content | {"checksum": _checksum(values, index)}:',
        'found.keys() != {*content, "checksum"}:',
        "tests/evaluation/test_features.py::test_a_changed_bit_or_an_impossible_number_of_an_image_is_not_read",
    ),
    Mistake(
        "a file may refer to the environment",
        "arguments.py",
        'if isinstance(value, str) and "${" in value:',
        "if False:",
        TRUST + "test_a_file_cannot_refer_to_the_environment_or_to_other_values",
    ),
    Mistake(
        "a file may choose code as its method",
        "objectives/__init__.py",
        "    if method not in names():\n        raise UserError(\n            f\"{where} has",
        "    if False:\n        raise UserError(\n            f\"{where} has",
        TRUST + "test_reading_a_run_does_not_run_its_method_unless_the_user_allows_it",
    ),
    Mistake(
        "any argument of timm is passed on",
        "model/factory.py",
        "        if key not in known:",
        "        if False:",
        TRUST + "test_arguments_of_a_model_are_plain_values_and_name_no_file_no_place_and_no_code",
    ),
    Mistake(
        "a model may be of any size",
        "model/factory.py",
        "if self.numbers > most or self.tensors > tensors:",
        "if False:",
        TRUST + "test_heads_and_decoders_have_the_limit_too",
    ),
    Mistake(
        "a slow server is waited for",
        "data/sources/download.py",
        "if done - slow_done < SLOWEST * SLOW_SECONDS:",
        "if False:",
        "tests/data/sources/test_download.py::test_a_hostile_server_reaches_a_limit_and_leaves_nothing",
    ),
    Mistake(
        "an archive may unpack to any size",
        "data/sources/archive.py",
        "if size > unpacked_limit(packed):",
        "if False:",
        LIMITS + "test_hostile_files_are_refused_in_little_memory",
    ),
    Mistake(
        "a pipe is opened as a file of images",
        "data/sources/limits.py",
        "if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):",
        "if False:",
        LIMITS + "test_pipes_and_devices_are_refused_where_a_file_is_expected",
    ),
    Mistake(
        "names reach the terminal as they are",
        "errors.py",
        "return UNPRINTABLE.sub(escaped, text)",
        "return text",
        "tests/data/test_broken.py::test_names_of_any_bytes_are_listed_on_one_line_and_reach_no_terminal",
    ),
]  # fmt: skip
