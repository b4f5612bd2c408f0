"""Texts of /metrics as endpoint pickers read them, each by hand."""

FULL = """\
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="demo"} 3.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="demo"} 7.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="demo"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="bf16",num_gpu_blocks="4096"} 1.0
"""
LORA = """\
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 1.795e9
vllm:lora_requests_info{max_lora="4",running_lora_adapters="red, blue,",waiting_lora_adapters="green"} 1.796e9
vllm:lora_requests_info{max_lora="9",running_lora_adapters="",waiting_lora_adapters=""} 1.79e9
"""
