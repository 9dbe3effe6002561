// Compiled once per instruction set: KEYPAST_VARIANT names the namespace, the compiler's flags choose the instructions.
// Nothing from the standard library but memcpy: an inline function of its own could be linked from the wrong variant.
#include "attend.h"
#include "rows.h"
#include "int8.h"

#define KEYPAST_TEXT_OF(name) #name
#define KEYPAST_TEXT(name) KEYPAST_TEXT_OF(name)

namespace keypast::KEYPAST_VARIANT {

extern const Variant table;
const Variant table = {
    KEYPAST_TEXT(KEYPAST_VARIANT), scratch_size, partial_size, write, attend, merge, rms_norm, silu_gate,
    quantize, multiply<false>,
};
#if defined(__AVX512F__)
extern const Variant vnni_table;
const Variant vnni_table = {
    "avx512vnni", scratch_size, partial_size, write, attend, merge, rms_norm, silu_gate, quantize, multiply<true>,
};
#endif

}  // namespace keypast::KEYPAST_VARIANT
