"""Downloads a packed model: `kafjax pull OWNER/NAME model.kafjax`.

From a repository of the Hugging Face Hub, or of the server in the variable HF_ENDPOINT, to which
`kafjax push` uploaded it. The file is verified before it is put in its place. Needs the extra
`hub`; private repositories need a token (`hf auth login`).
"""


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import run_app
    from kafjax.errors import UserError

    revision = flags.DEFINE_string("revision", None, "A branch, tag or commit. Default: main.")

    def command(arguments: list[str]) -> None:
        from kafjax.inference.hub import pull
        from kafjax.paths import expand

        if len(arguments) != 2:
            raise UserError("expected a repository and a file: OWNER/NAME model.kafjax")
        repository, path = arguments
        pull(repository, expand(path), revision=revision.value)
        print(f"Wrote {path}", flush=True)

    run_app(command, with_arguments=True)


if __name__ == "__main__":
    _run_from_command_line()
