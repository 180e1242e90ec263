"""What the daemon tells the plugin, through the environment."""

from dataclasses import dataclass

from flexpiped_served.settings import PluginSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(PluginSettings):
    """In variables whose names begin with FLEXPIPED_VLLM."""

    @classmethod
    def prefix(cls) -> str:
        return "FLEXPIPED_VLLM"
