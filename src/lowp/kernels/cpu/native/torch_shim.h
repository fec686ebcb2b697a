// The part of torch's stable C interface that the operators use, declared by hand: no header of torch is needed to build, and one
// binary serves every torch from 2.10 on. Source: torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h.
//
// An operator gets its arguments as words of 64 bits: a tensor as an owned handle, an integer as itself, a list as an owned handle
// of words, an optional as null or the address of a word that the callee deletes. It answers in the first word.
#pragma once
#include <cstdint>

extern "C" {

struct AtenTensorOpaque;
struct StableListOpaque;
struct TorchLibraryOpaque;
using TorchTensor = AtenTensorOpaque*;
using TorchList = StableListOpaque*;
using TorchLibrary = TorchLibraryOpaque*;
using Word = uint64_t;  // StableIValue

int32_t aoti_torch_delete_tensor_object(TorchTensor);
int32_t aoti_torch_get_dim(TorchTensor, int64_t*);
int32_t aoti_torch_get_numel(TorchTensor, int64_t*);
int32_t aoti_torch_get_sizes(TorchTensor, int64_t**);
int32_t aoti_torch_get_strides(TorchTensor, int64_t**);
int32_t aoti_torch_get_dtype(TorchTensor, int32_t*);
int32_t aoti_torch_get_data_ptr(TorchTensor, void**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t dtype, int32_t device, int32_t index, TorchTensor*);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_float8_e4m3fn();
int32_t aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line, TorchLibrary*);
int32_t torch_library_impl(TorchLibrary, const char* name, void (*)(Word*, uint64_t, uint64_t), uint64_t version);
int32_t torch_list_size(TorchList, size_t*);
int32_t torch_list_get_item(TorchList, size_t, Word*);
int32_t torch_delete_list(TorchList);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
}

constexpr uint64_t kTorchVersion = (2ULL << 56) | (10ULL << 48);  // 2.10
