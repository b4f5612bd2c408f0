"""The emulator's templates: finds them by name, and describes them as the service does."""

from collections.abc import Iterable

from google.cloud import modelarmor_v1 as armor

from cabochon.engine.errors import ConfigError
from cabochon.server.armor.config import TEMPLATE
from cabochon.server.armor.emulator_filters import RAI_TYPES
from cabochon.server.armor.emulator_templates import ANY, TemplateSpec, parse_template

PAGE_SIZE = 100
_MEDIUM = armor.DetectionConfidenceLevel.MEDIUM_AND_ABOVE


class Catalog:
    """Templates by name; the one named `*` stands for all others."""

    def __init__(self, templates: Iterable[TemplateSpec | str]) -> None:
        """templates: or words, as parse_template reads them. Raises ConfigError if a name is there twice."""
        self._specs: dict[str, TemplateSpec] = {}
        for given in templates:
            spec = parse_template(given) if isinstance(given, str) else given
            if spec.name in self._specs:
                raise ConfigError(f"templates must differ in name, {spec.name} is there twice: drop one")
            self._specs[spec.name] = spec

    @property
    def names(self) -> list[str]:
        """Of all templates that have one, in their order."""
        return [name for name in self._specs if name != ANY]

    def is_name(self, name: str) -> bool:
        """Whether it has the form of a template's name."""
        return TEMPLATE.fullmatch(name) is not None

    def find(self, name: str) -> TemplateSpec | None:
        """None if there is none."""
        return self._specs.get(name) or self._specs.get(ANY)

    def page(self, request: armor.ListTemplatesRequest) -> armor.ListTemplatesResponse | None:
        """Templates of one location that have names, in order of theirs. None: it was not our page token."""
        token = request.page_token or "0"
        start = int(token) if token.isascii() and token.isdigit() else -1
        names = sorted(name for name in self.names if name.rpartition("/templates/")[0] == request.parent)
        if not 0 <= start <= len(names):
            return None
        size = request.page_size if 0 < request.page_size < PAGE_SIZE else PAGE_SIZE
        end = start + size
        return armor.ListTemplatesResponse(
            templates=[self.message(name, self._specs[name]) for name in names[start:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    def message(self, name: str, spec: TemplateSpec) -> armor.Template:
        """The template `spec` under that name."""
        location = name.partition("/templates/")[0]
        config = armor.FilterConfig()
        if "rai" in spec.filters:
            config.rai_settings = armor.RaiFilterSettings(
                rai_filters=[
                    armor.RaiFilterSettings.RaiFilter(filter_type=kind, confidence_level=_MEDIUM)
                    for kind in RAI_TYPES.values()
                ]
            )
        if "sdp" in spec.filters:  # not the basic configuration, which knows no e-mail addresses
            advanced = armor.SdpAdvancedConfig(inspect_template=f"{location}/inspectTemplates/emulator")
            if spec.has_deidentify:
                advanced.deidentify_template = f"{location}/deidentifyTemplates/emulator"
            config.sdp_settings = armor.SdpFilterSettings(advanced_config=advanced)
        if "pi_and_jailbreak" in spec.filters:
            injection = armor.PiAndJailbreakFilterSettings
            config.pi_and_jailbreak_filter_settings = injection(
                filter_enforcement=injection.PiAndJailbreakFilterEnforcement.ENABLED, confidence_level=_MEDIUM
            )
        if "malicious_uris" in spec.filters:
            uris = armor.MaliciousUriFilterSettings
            config.malicious_uri_filter_settings = uris(
                filter_enforcement=uris.MaliciousUriFilterEnforcement.ENABLED
            )
        enforcement = armor.Template.TemplateMetadata.EnforcementType
        metadata = armor.Template.TemplateMetadata(
            ignore_partial_invocation_failures=spec.ignores_partial,
            log_sanitize_operations=spec.logs_sanitize,
            enforcement_type=(
                enforcement.INSPECT_ONLY if spec.is_inspect_only else enforcement.INSPECT_AND_BLOCK
            ),
        )
        return armor.Template(name=name, filter_config=config, template_metadata=metadata)
