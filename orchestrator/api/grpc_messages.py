"""The messages of KServe v2 over gRPC with Triton's extensions, and its service."""

from __future__ import annotations

from orchestrator.api import grpc_model_config  # noqa: F401  declares what ModelConfigResponse holds
from orchestrator.api.grpc_schema import declare, message

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

declare(
    "truthgpt/grpc_service.proto",
    PACKAGE,
    """
ServerLiveRequest:
ServerLiveResponse: bool live 1
ServerReadyRequest:
ServerReadyResponse: bool ready 1
ModelReadyRequest: string name 1, string version 2
ModelReadyResponse: bool ready 1
ServerMetadataRequest:
ServerMetadataResponse: string name 1, string version 2, repeated string extensions 3
ModelMetadataRequest: string name 1, string version 2
ModelMetadataResponse: string name 1, repeated string versions 2, string platform 3,
    repeated TensorMetadata inputs 4, repeated TensorMetadata outputs 5
ModelMetadataResponse.TensorMetadata: string name 1, string datatype 2, repeated int64 shape 3
InferParameter: bool parameter_choice.bool_param 1, int64 parameter_choice.int64_param 2,
    string parameter_choice.string_param 3, double parameter_choice.double_param 4,
    uint64 parameter_choice.uint64_param 5
InferTensorContents: repeated bool bool_contents 1, repeated int32 int_contents 2, repeated int64 int64_contents 3,
    repeated uint32 uint_contents 4, repeated uint64 uint64_contents 5, repeated float fp32_contents 6,
    repeated double fp64_contents 7, repeated bytes bytes_contents 8
ModelInferRequest: string model_name 1, string model_version 2, string id 3,
    map<string,InferParameter> parameters 4, repeated InferInputTensor inputs 5,
    repeated InferRequestedOutputTensor outputs 6, repeated bytes raw_input_contents 7
ModelInferRequest.InferInputTensor: string name 1, string datatype 2, repeated int64 shape 3,
    map<string,InferParameter> parameters 4, InferTensorContents contents 5
ModelInferRequest.InferRequestedOutputTensor: string name 1, map<string,InferParameter> parameters 2
ModelInferResponse: string model_name 1, string model_version 2, string id 3,
    map<string,InferParameter> parameters 4, repeated InferOutputTensor outputs 5, repeated bytes raw_output_contents 6
ModelInferResponse.InferOutputTensor: string name 1, string datatype 2, repeated int64 shape 3,
    map<string,InferParameter> parameters 4, InferTensorContents contents 5
ModelStreamInferResponse: string error_message 1, ModelInferResponse infer_response 2
ModelConfigRequest: string name 1, string version 2
ModelConfigResponse: ModelConfig config 1
ModelStatisticsRequest: string name 1, string version 2
StatisticDuration: uint64 count 1, uint64 ns 2
InferStatistics: StatisticDuration success 1, StatisticDuration fail 2, StatisticDuration queue 3,
    StatisticDuration compute_input 4, StatisticDuration compute_infer 5, StatisticDuration compute_output 6,
    StatisticDuration cache_hit 7, StatisticDuration cache_miss 8
InferResponseStatistics: StatisticDuration compute_infer 1, StatisticDuration compute_output 2,
    StatisticDuration success 3, StatisticDuration fail 4, StatisticDuration empty_response 5,
    StatisticDuration cancel 6
InferBatchStatistics: uint64 batch_size 1, StatisticDuration compute_input 2, StatisticDuration compute_infer 3,
    StatisticDuration compute_output 4
MemoryUsage: string type 1, int64 id 2, uint64 byte_size 3
ModelStatistics: string name 1, string version 2, uint64 last_inference 3, uint64 inference_count 4,
    uint64 execution_count 5, InferStatistics inference_stats 6, repeated InferBatchStatistics batch_stats 7,
    repeated MemoryUsage memory_usage 8, map<string,InferResponseStatistics> response_stats 9
ModelStatisticsResponse: repeated ModelStatistics model_stats 1
ModelRepositoryParameter: bool parameter_choice.bool_param 1, int64 parameter_choice.int64_param 2,
    string parameter_choice.string_param 3, bytes parameter_choice.bytes_param 4
RepositoryIndexRequest: string repository_name 1, bool ready 2
RepositoryIndexResponse: repeated ModelIndex models 1
RepositoryIndexResponse.ModelIndex: string name 1, string version 2, string state 3, string reason 4
RepositoryModelLoadRequest: string repository_name 1, string model_name 2,
    map<string,ModelRepositoryParameter> parameters 3
RepositoryModelLoadResponse:
RepositoryModelUnloadRequest: string repository_name 1, string model_name 2,
    map<string,ModelRepositoryParameter> parameters 3
RepositoryModelUnloadResponse:
SystemSharedMemoryStatusRequest: string name 1
SystemSharedMemoryStatusResponse: map<string,RegionStatus> regions 1
SystemSharedMemoryStatusResponse.RegionStatus: string name 1, string key 2, uint64 offset 3, uint64 byte_size 4
SystemSharedMemoryRegisterRequest: string name 1, string key 2, uint64 offset 3, uint64 byte_size 4
SystemSharedMemoryRegisterResponse:
SystemSharedMemoryUnregisterRequest: string name 1
SystemSharedMemoryUnregisterResponse:
CudaSharedMemoryStatusRequest: string name 1
CudaSharedMemoryStatusResponse: map<string,RegionStatus> regions 1
CudaSharedMemoryStatusResponse.RegionStatus: string name 1, uint64 device_id 2, uint64 byte_size 3
CudaSharedMemoryRegisterRequest: string name 1, bytes raw_handle 2, int64 device_id 3, uint64 byte_size 4
CudaSharedMemoryRegisterResponse:
CudaSharedMemoryUnregisterRequest: string name 1
CudaSharedMemoryUnregisterResponse:
TraceSettingRequest: map<string,SettingValue> settings 1, string model_name 2
TraceSettingRequest.SettingValue: repeated string value 1
TraceSettingResponse: map<string,SettingValue> settings 1
TraceSettingResponse.SettingValue: repeated string value 1
LogSettingsRequest: map<string,SettingValue> settings 1
LogSettingsRequest.SettingValue: bool parameter_choice.bool_param 1, uint32 parameter_choice.uint32_param 2,
    string parameter_choice.string_param 3
LogSettingsResponse: map<string,SettingValue> settings 1
LogSettingsResponse.SettingValue: bool parameter_choice.bool_param 1, uint32 parameter_choice.uint32_param 2,
    string parameter_choice.string_param 3
GRPCInferenceService ! ServerLive(ServerLiveRequest) returns (ServerLiveResponse)
GRPCInferenceService ! ServerReady(ServerReadyRequest) returns (ServerReadyResponse)
GRPCInferenceService ! ModelReady(ModelReadyRequest) returns (ModelReadyResponse)
GRPCInferenceService ! ServerMetadata(ServerMetadataRequest) returns (ServerMetadataResponse)
GRPCInferenceService ! ModelMetadata(ModelMetadataRequest) returns (ModelMetadataResponse)
GRPCInferenceService ! ModelInfer(ModelInferRequest) returns (ModelInferResponse)
GRPCInferenceService ! ModelStreamInfer(stream ModelInferRequest) returns (stream ModelStreamInferResponse)
GRPCInferenceService ! ModelConfig(ModelConfigRequest) returns (ModelConfigResponse)
GRPCInferenceService ! ModelStatistics(ModelStatisticsRequest) returns (ModelStatisticsResponse)
GRPCInferenceService ! RepositoryIndex(RepositoryIndexRequest) returns (RepositoryIndexResponse)
GRPCInferenceService ! RepositoryModelLoad(RepositoryModelLoadRequest) returns (RepositoryModelLoadResponse)
GRPCInferenceService ! RepositoryModelUnload(RepositoryModelUnloadRequest) returns (RepositoryModelUnloadResponse)
GRPCInferenceService ! SystemSharedMemoryStatus(SystemSharedMemoryStatusRequest)
    returns (SystemSharedMemoryStatusResponse)
GRPCInferenceService ! SystemSharedMemoryRegister(SystemSharedMemoryRegisterRequest)
    returns (SystemSharedMemoryRegisterResponse)
GRPCInferenceService ! SystemSharedMemoryUnregister(SystemSharedMemoryUnregisterRequest)
    returns (SystemSharedMemoryUnregisterResponse)
GRPCInferenceService ! CudaSharedMemoryStatus(CudaSharedMemoryStatusRequest) returns (CudaSharedMemoryStatusResponse)
GRPCInferenceService ! CudaSharedMemoryRegister(CudaSharedMemoryRegisterRequest)
    returns (CudaSharedMemoryRegisterResponse)
GRPCInferenceService ! CudaSharedMemoryUnregister(CudaSharedMemoryUnregisterRequest)
    returns (CudaSharedMemoryUnregisterResponse)
GRPCInferenceService ! TraceSetting(TraceSettingRequest) returns (TraceSettingResponse)
GRPCInferenceService ! LogSettings(LogSettingsRequest) returns (LogSettingsResponse)
""",
)

InferRequest = message(f"{PACKAGE}.ModelInferRequest")
InferResponse = message(f"{PACKAGE}.ModelInferResponse")
StreamResponse = message(f"{PACKAGE}.ModelStreamInferResponse")
