"""The check of vLLM's internals, in vLLM's own interpreter: what is not as expected is refused, with the version."""

import os
import subprocess

import pytest

from engines.served.plugin_path import plugin_path
from engines.vllm.command import PLUGIN
from engines.vllm.own_server import own_server
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm]
_SCRIPT = """
from flexpiped_vllm import internals, refusals
print("as it is:", internals.check())
version, internals.VERSION = internals.VERSION, "0.99.1"
print("unknown:", internals.check())
internals.VERSION = version
make_layers = internals.model_utils.make_layers
internals.model_utils.make_layers = lambda count, layer_fn: None
print("changed:", internals.check())
internals.model_utils.make_layers = make_layers
from types import SimpleNamespace as N
from vllm.config import CompilationMode, CUDAGraphMode
def refused(mode, *, backend="inductor", graphs=CUDAGraphMode.NONE, inductor={}, ubatch=False):
    compilation = N(mode=mode, backend=backend, cudagraph_mode=graphs, inductor_compile_config=inductor)
    config = N(compilation_config=compilation, parallel_config=N(use_ubatching=ubatch))
    return ", ".join(name for name, present in refusals.of_compiled_mode(config) if present)
once = CompilationMode.DYNAMO_TRACE_ONCE
print("eager mode:", refused(CompilationMode.NONE, inductor={"max_autotune": True}, ubatch=True))
print("compiled mode:", refused(once))
print("stock:", refused(CompilationMode.STOCK_TORCH_COMPILE))
print("no cache:", refused(once, backend="eager"))
print("tuned:", refused(once, inductor={"max_autotune": True}))
print("micro-batches:", refused(CompilationMode.VLLM_COMPILE, graphs=CUDAGraphMode.FULL, ubatch=True))
def whole(lora=None, images=False, quantisation=None, offloaded_gb=0):
    model = N(quantization=quantisation, is_multimodal_model=images, is_attention_free=False, is_hybrid=False)
    parallel = N(pipeline_parallel_size=2, data_parallel_size=1, enable_expert_parallel=False, use_ubatching=False)
    compilation = N(mode=CompilationMode.NONE, backend="inductor", cudagraph_mode=CUDAGraphMode.NONE,
                    inductor_compile_config={})
    return N(
        model_config=model, parallel_config=parallel, compilation_config=compilation, lora_config=lora,
        speculative_config=None, kv_transfer_config=None, use_v2_model_runner=False,
        scheduler_config=N(async_scheduling=False),
        offload_config=N(uva=N(cpu_offload_gb=offloaded_gb), prefetch=N(offload_group_size=0)))
print("plain:", refusals.of_moves(whole()))
print("lora:", refusals.of_moves(whole(lora=N(max_lora_rank=16))))
print("images of few bits:", refusals.of_moves(whole(images=True, quantisation="gptq")))
print("first, plain:", refusals.of_first_layers(whole()))
print("first, lora:", refusals.of_first_layers(whole(lora=N(max_lora_rank=16))))
print("first, images of few bits, offloaded:",
      refusals.of_first_layers(whole(images=True, quantisation="gptq", offloaded_gb=1)))
def refused_connector(name="NixlConnector", role="kv_both", ranks=1, caching=True):
    config = N(kv_transfer_config=N(kv_connector=name, kv_role=role), parallel_config=N(pipeline_parallel_size=ranks),
               cache_config=N(enable_prefix_caching=caching))
    return ", ".join(name for name, present in refusals.of_connector(config) if present)
print("nixl:", refused_connector())
print("nixl by another name:", refused_connector("NixlPullConnector"))
print("nixl pushes:", refused_connector("NixlPushConnector"))
print("nixl one way:", refused_connector(role="kv_producer"))
print("nixl of ranks:", refused_connector(ranks=2))
print("nixl uncached:", refused_connector(caching=False))
encoder = N(vllm_config=whole(), kv_cache_config=N(kv_cache_groups=[]), needs_kv_cache_zeroing=False)
print("encoder, copied:", refusals.of_kv_copy(encoder))
print("encoder, moved:", refusals.of_groups(encoder.kv_cache_config))
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
print("nixl is there:", all(name in KVConnectorFactory._registry for name in refusals._PULL_BY_NIXL))
from vllm.model_executor.models.interfaces import supports_pp
from vllm.model_executor.models.registry import ModelRegistry
without = (
    "BertModel BertForMaskedLM BertForSequenceClassification BertForTokenClassification RobertaModel XLMRobertaModel "
    "RobertaForSequenceClassification XLMRobertaForSequenceClassification ModernBertModel NomicBertModel GteNewModel "
    "AriaForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration Idefics3ForConditionalGeneration "
    "Mamba2ForCausalLM SmolVLMForConditionalGeneration WhisperForConditionalGeneration "
    "Zamba2ForCausalLM").split()
def has_pipeline(name):
    return supports_pp(ModelRegistry.models[name].load_model_cls())
print("pipelines after all:", *filter(has_pipeline, without))
print("a pipeline:", has_pipeline("LlamaForCausalLM"))
internals._missing = "cannot import name 'get_pp_group'"
print("missing:", internals.check())
print("connector as it is:", internals.check_connector())
internals.VERSION = "0.99.1"
print("connector unknown:", internals.check_connector())
print("sampling:", *internals.SamplingParams.__struct_fields__)
"""
# What vLLM's own server sets by itself, or lets nobody set.
_NOBODYS = {
    *("detokenize", "output_kind", "output_text_buffer_length", "skip_clone", "flat_logprobs"),
    *("skip_reading_prefix_cache", "prompt_logprob_start", "prompt_logprob_token_ids", "trace_decode_token_ids"),
    "extra_args",  # a request says vllm_xargs
}
_CONNECTOR = """
from types import SimpleNamespace as N
from flexpiped_vllm.kv_connector import make_connector
config = N(kv_transfer_config=None, cache_config=N(block_size=4),
           scheduler_config=N(disable_hybrid_kv_cache_manager=False))
connector = make_connector(config, None)
loads = []
connector.load = lambda *load: loads.append(load)
connector.offer("/dev/shm/a", 10)
request = N(kv_transfer_params={"flexpiped": "/dev/shm/a"}, num_tokens=13)
blocks = N(get_block_ids=lambda: ([7, 8, 9, 5],))
def asked(request, cached):
    tokens, later = connector.get_num_new_matched_tokens(request, cached)
    connector.update_state_after_alloc(request, blocks, tokens)
    connector.build_connector_meta(None)
    found, loads[:] = list(loads), []
    return tokens, later, found
print("nothing cached:", asked(request, 0))
print("a block cached:", asked(request, 4))
print("more cached:", asked(request, 12))
print("fewer tokens known:", asked(N(**{**vars(request), "num_tokens": 7}), 0))
print("another request:", asked(N(kv_transfer_params=None, num_tokens=13), 0))
print("ended:", connector.request_finished_all_groups(request, ([7],)), config.kv_transfer_config)
print("withdrawn:", connector.withdraw("/dev/shm/a"), asked(request, 0))
"""


def said_by(script: str) -> dict[str, str]:
    """Run a script in vLLM's interpreter, and return what it printed after each heading."""
    environment = {"PYTHONPATH": plugin_path(PLUGIN), "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [interpreter(), "-c", script], env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    lines = [line.split(":", 1) for line in done.stdout.splitlines() if ":" in line]
    return {heading: words.strip() for heading, words in lines}


def test_a_request_is_loaded_as_far_as_its_kv_cache_goes() -> None:
    said = said_by(_CONNECTOR)
    assert said["nothing cached"] == "(10, False, [('/dev/shm/a', 0, [7, 8, 9])])"
    assert said["a block cached"] == "(6, False, [('/dev/shm/a', 1, [8, 9])])"
    assert said["more cached"] == "(0, False, [])"
    assert said["fewer tokens known"] == "(6, False, [('/dev/shm/a', 0, [7, 8])])"  # the last is always computed
    assert said["another request"] == "(0, False, [])"
    assert said["ended"] == "(False, None) None"
    assert said["withdrawn"] == "False (0, False, [])"


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    return said_by(_SCRIPT)


def test_an_unknown_vllm_is_refused_for_moves_in_place(said: dict[str, str]) -> None:
    assert said["as it is"] == said["connector as it is"] == ""
    assert "vLLM 0.99.1 is not a version that copies of KV were tested with (0.32.0)" in said["connector unknown"]
    assert "vLLM 0.99.1 is not a version that moves in place were tested with (0.32.0)" in said["unknown"]
    assert "make_layers(num_hidden_layers, layer_fn, prefix) is not what it was" in said["changed"]
    assert "0.32.0: cannot import name 'get_pp_group'" in said["missing"]
    assert said["eager mode"].strip() == said["compiled mode"].strip() == ""
    assert "compilation mode" in said["stock"]
    assert "compiled mode without vLLM's compile cache" in said["no cache"]
    assert "max_autotune (it freezes weights into the code)" in said["tuned"]
    assert "CUDA graphs of micro-batches" in said["micro-batches"]


def test_features_that_do_not_move_are_refused_by_their_names(said: dict[str, str]) -> None:
    assert said["plain"] == ""
    assert said["lora"] == "moves in place are not supported with LoRA"
    assert said["images of few bits"] == "moves in place are not supported with quantisation (gptq), multimodal models"


def test_first_layers_that_are_not_kept_are_refused_by_what_they_have(said: dict[str, str]) -> None:
    assert said["first, plain"] == said["first, lora"] == ""
    words = "they are not kept with quantisation (gptq), multimodal models, offloaded weights"
    assert said["first, images of few bits, offloaded"] == words


def test_what_nixl_does_not_do_is_refused_by_its_name(said: dict[str, str]) -> None:
    assert said["nixl"] == said["nixl by another name"] == ""
    assert said["nixl is there"] == "True"
    assert said["nixl pushes"] == "a KV connector of its own (--kv-transfer-config)"
    assert said["nixl one way"] == "NIXL in one direction (kv_role kv_producer is not kv_both)"
    assert said["nixl of ranks"] == "NIXL over 2 pipeline ranks"
    assert said["nixl uncached"] == "NIXL without a prefix cache"


def test_an_encoder_has_no_kv_cache_to_move_or_copy(said: dict[str, str]) -> None:
    assert said["encoder, copied"] == "no KV cache is copied with an encoder, which has none"
    assert said["encoder, moved"] == "moves in place are not supported without a KV cache (encoders)"


def test_models_that_are_refused_in_several_ranks_have_no_pipeline(said: dict[str, str]) -> None:
    """The architectures of the families in ``engines.vllm.pipelining``."""
    assert (said["pipelines after all"], said["a pipeline"]) == ("", "True")


def test_every_sampling_parameter_can_be_asked_for(said: dict[str, str]) -> None:
    own = own_server(())
    fields = {name for name in said["sampling"].split() if not name.startswith("_")}
    assert fields - own.completion_parameters == fields - own.chat_parameters == _NOBODYS
