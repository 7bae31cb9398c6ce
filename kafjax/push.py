"""Uploads a packed model: `kafjax push model.kafjax OWNER/NAME`.

A repository of the Hugging Face Hub, or of the server in the variable HF_ENDPOINT, made if it is
missing: private, unless `--public`. It also gets a model card, unless it has a README.md already.
`kafjax pull` downloads the model. Needs the extra `hub`, and a token (`hf auth login`).
"""


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import run_app
    from kafjax.errors import UserError

    public = flags.DEFINE_bool("public", False, "Make a new repository public.")

    def command(arguments: list[str]) -> None:
        from kafjax.inference.hub import push
        from kafjax.paths import expand

        if len(arguments) != 2:
            raise UserError("expected a model and a repository: model.kafjax OWNER/NAME")
        path, repository = arguments
        print(f"Pushed to {push(expand(path), repository, public=public.value)}", flush=True)

    run_app(command, with_arguments=True)


if __name__ == "__main__":
    _run_from_command_line()
