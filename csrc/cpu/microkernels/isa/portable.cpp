// 16 registers of 4 floats, for every processor of the platform: SSE2 on x86-64, NEON on 64-bit Arm.
#define HNE_ISA portable
#define HNE_VECTOR_BYTES 16
#define HNE_REGISTERS 16
#define HNE_VNNI 0
#define HNE_BF16 0

#include "../quantized.h"
#include "bfloat16_table.h"
#include "table.h"
