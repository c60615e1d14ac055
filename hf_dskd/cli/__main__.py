"""`python -m hf_dskd.cli`, which launchers can start."""

from . import main


if __name__ == "__main__":
    main()
