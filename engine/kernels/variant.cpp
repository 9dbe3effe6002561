// Compiled once per instruction set: KEYPAST_VARIANT names the namespace, the compiler's flags choose the instructions.
// Nothing from the standard library but memcpy: an inline function of its own could be linked from the wrong variant.
#include "attend.h"
#include "rows.h"
#include "linear.h"

#define KEYPAST_TEXT_OF(name) #name
#define KEYPAST_TEXT(name) KEYPAST_TEXT_OF(name)

namespace keypast::KEYPAST_VARIANT {

#define KEYPAST_VARIANT_TABLE(symbol, name, vnni, bf16)                                                 \
  extern const Variant symbol;                                                                          \
  const Variant symbol = {                                                                              \
      name,         scratch_size, partial_size, write, attend<bf16>, merge<bf16>, rms_norm, silu_gate, \
      prepare<bf16>, multiply<vnni, bf16>,                                                                             \
  };

KEYPAST_VARIANT_TABLE(table, KEYPAST_TEXT(KEYPAST_VARIANT), false, false)
#if defined(__AVX512F__)
KEYPAST_VARIANT_TABLE(vnni_table, "avx512vnni", true, false)
KEYPAST_VARIANT_TABLE(bf16_table, "avx512bf16", true, true)
#endif

}  // namespace keypast::KEYPAST_VARIANT
