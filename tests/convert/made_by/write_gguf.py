"""Write model.gguf beside this file, with the package of llama.cpp:

pip install gguf==0.18.0
python tests/convert/made_by/write_gguf.py
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

values = np.arange(64, dtype=np.float32).reshape(2, 32) / 7

writer = gguf.GGUFWriter(Path(__file__).parent / "model.gguf", "llama")
writer.add_custom_alignment(64)
writer.add_block_count(1)
writer.add_token_list(["<s>", "", "tök"])
writer.add_token_scores([0.0, -1.5, 2.0])
writer.add_bool("some.flag", True)
writer.add_tensor("blk.0.attn_q.weight", values)
writer.add_tensor("blk.0.ffn_up.weight", values.reshape(2, 4, 8).astype(np.float16))
writer.add_tensor("bias", np.arange(3, dtype=np.float64))
writer.add_tensor("positions", np.arange(5, dtype=np.int32) - 2)
quantize = gguf.quants.quantize
writer.add_tensor("token_embd.weight", quantize(values, Kind.BF16), raw_dtype=Kind.BF16)
writer.add_tensor("output.weight", quantize(values, Kind.Q8_0), raw_dtype=Kind.Q8_0)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
